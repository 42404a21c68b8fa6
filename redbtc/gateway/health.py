"""The routes for supervisors, monitors and browsers: /healthz, /readyz, /status, /metrics, and CORS
preflights."""

from __future__ import annotations

import hmac
import ipaddress
import os
import sqlite3
import time

import msgspec
import prometheus_client
from msgspec.structs import asdict

from redbtc.dashboard.lazy import LazyDashboard
from redbtc.dashboard.sessions import PAGE_HEADERS
from redbtc.dashboard.status import prefers_html
from redbtc.dashboard.status import status as public_status
from redbtc.gateway.gateway import Gateway
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

    def __init__(self, gateway: Gateway, dashboard: LazyDashboard) -> None:
        self._gateway = gateway
        self._dashboard = dashboard

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

    async def status(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer to everybody whether the gateway works, and with the notices for all accounts, as
        JSON or as a page."""
        request = request_of(scope)
        request.route = "/status"
        gateway = self._gateway
        uptime, can_serve = round(time.monotonic() - gateway.started), gateway.upstreams.can_serve()
        try:
            status = await public_status(gateway.billing, uptime, can_serve)
        except sqlite3.Error:
            raise Refusal("ledger_unavailable") from None
        accept = header(scope["headers"], b"accept") or b""
        if prefers_html(accept.decode("latin-1")):
            page = await self._dashboard.render("status.html", asdict(status))
            headers = [(name.encode(), value.encode()) for name, value in PAGE_HEADERS.items()]
            content_type = page.headers["content-type"].encode()
            await respond(request, send, page.status_code, bytes(page.body), headers, content_type)
        else:
            await respond(request, send, 200, msgspec.json.encode(status))

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
