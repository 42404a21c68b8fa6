"""The routes for supervisors, monitors and browsers: /healthz, /readyz, /metrics, and CORS
preflights; /status is in status_route.py."""

from __future__ import annotations

import hmac
import ipaddress
import os

import prometheus_client

from redbtc.dashboard.lazy import LazyDashboard
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.status_route import StatusRoute
from redbtc.gateway.uptime import UptimeMeter
from redbtc.headers import header
from redbtc.refusals import Refusal
from redbtc.server.asgi import Receive, Scope, Send, ids_of, request_of, respond
from redbtc.server.cors import cors_headers, preflight_headers


async def healthz(scope: Scope, _: Receive, send: Send) -> None:
    """Answer that the process lives. Asks for no key and no database."""
    request = request_of(scope)
    request.route = "/healthz"
    await respond(request, send, 200, b'{"status":"ok"}')


class HealthRoutes:
    """The routes that say how the gateway is."""

    def __init__(self, gateway: Gateway, dashboard: LazyDashboard, meter: UptimeMeter) -> None:
        self._gateway = gateway
        self.status = StatusRoute(gateway, dashboard, meter)

    async def readyz(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer whether a request would be served. Raises Refusal."""
        request = request_of(scope)
        request.route = "/readyz"
        gateway = self._gateway
        if gateway.draining:
            raise Refusal("draining")
        if not gateway.upstreams.can_serve():
            raise Refusal("no_upstream", retry_after=5)
        if not await gateway.store.can_commit():
            raise Refusal("ledger_unavailable")
        await respond(request, send, 200, b'{"status":"ready"}')

    async def metrics(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer with the metrics as Prometheus text, to loopback or with the token of the
        settings. Raises Refusal."""
        request = request_of(scope)
        request.route = "/metrics"
        if not self._may_read_metrics(scope):
            raise Refusal("metrics_forbidden")
        body = prometheus_client.generate_latest(self._gateway.telemetry.registry)
        content_type = prometheus_client.CONTENT_TYPE_LATEST.encode()
        await respond(request, send, 200, body, content_type=content_type)

    def _may_read_metrics(self, scope: Scope) -> bool:
        variable = self._gateway.settings.metrics.token_env
        if variable:
            expected = f"Bearer {os.environ.get(variable, '')}".encode()
            shown = header(scope["headers"], b"authorization") or b""
            return len(expected) > 7 and hmac.compare_digest(expected, shown)
        try:
            return ipaddress.ip_address(scope["client"][0]).is_loopback
        except (TypeError, ValueError):
            return False

    def allows_origin(self, origin: bytes) -> bool:
        """Return whether pages of that origin may use /v1."""
        return bool(cors_headers(origin, self._gateway.settings.server.cors_origins))

    def has_preflights(self) -> bool:
        """Return whether pages of any origin may use /v1."""
        return bool(self._gateway.settings.server.cors_origins)

    async def preflight(self, scope: Scope, send: Send) -> bool:
        """Answer a CORS preflight, which browsers send without a key. Return False if the
        request is no preflight, or comes from an origin whose pages may not use /v1."""
        origin = header(scope["headers"], b"origin")
        headers = preflight_headers(scope["headers"])
        if origin is None or headers is None or not self.allows_origin(origin):
            return False
        headers += ids_of(request_of(scope))
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return True
