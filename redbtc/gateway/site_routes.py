"""The routes of the operator's own pages: /terms, /privacy and /.well-known/security.txt. They need
no login, and 404 where [site] does not name them."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime

from starlette.datastructures import QueryParams
from starlette.responses import Response

from redbtc.config import PAGES, Settings
from redbtc.dashboard.lazy import LazyDashboard
from redbtc.errors import StorageUnavailable
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.plain_routes import get_route
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Receive, Scope, Send, request_of, respond
from redbtc.times import month_of, month_start, months_after

SECURITY_TXT = "/.well-known/security.txt"
MAX_QUERY_BYTES = 500
PAGE_CACHE = (
    b"public, max-age=60"  # so long a page can show a version that is not in force any more
)
SECURITY_TXT_CACHE = (b"cache-control", b"public, max-age=3600")
EXPIRES_AFTER_MONTHS = 11  # RFC 9116 §2.5.5: less than a year ahead


class SiteRoutes:
    """The routes of the pages that [site] names."""

    def __init__(self, gateway: Gateway, dashboard: LazyDashboard) -> None:
        self._gateway = gateway
        self._dashboard = dashboard
        documents = [get_route(f"/{name}", self._document(name)) for name in PAGES]
        self.routes = [*documents, get_route(SECURITY_TXT, self._security_txt)]

    def _document(self, name: str) -> App:
        """Return the app that shows a document."""

        async def show(scope: Scope, _: Receive, send: Send) -> None:
            request = request_of(scope)
            request.route = f"/{name}"
            if name not in self._gateway.billing.documents.names():
                raise Refusal("unknown_url")
            page = await self._page(name, scope["query_string"])
            headers = [each for each in page.raw_headers if each[0] not in SET_BY_RESPOND]
            if page.status_code == 200:
                headers = [each for each in headers if each[0] != b"cache-control"]
                headers.append((b"cache-control", PAGE_CACHE))
            content_type = page.headers["content-type"].encode()
            body = bytes(page.body)
            await respond(request, send, page.status_code, body, headers, content_type)

        return show

    async def _page(self, name: str, query: bytes) -> Response:
        """Return the page of a document, or a page that says that there is no such version. Raises
        Refusal."""
        version = QueryParams(query[:MAX_QUERY_BYTES]).get("version")
        try:
            found = await self._dashboard.document(name, version)
        except (sqlite3.Error, StorageUnavailable):
            raise Refusal("ledger_unavailable") from None
        if found is not None:
            return found
        problem = {"code": 404, "problem": "There is no such version."}
        page = await self._dashboard.render("error.html", problem)
        page.status_code = 404
        return page

    async def _security_txt(self, scope: Scope, _: Receive, send: Send) -> None:
        request = request_of(scope)
        request.route = SECURITY_TXT
        settings = self._gateway.settings
        if not settings.site.contact:
            raise Refusal("unknown_url")
        body = security_txt(settings, self._gateway.store.time()).encode()
        content_type = b"text/plain; charset=utf-8"
        await respond(request, send, 200, body, [SECURITY_TXT_CACHE], content_type)


SET_BY_RESPOND = (b"content-type", b"content-length")


def security_txt(settings: Settings, now: int) -> str:
    """Return the text of security.txt (RFC 9116). It stays the same for a month."""
    contact = settings.site.contact
    if "://" not in contact:
        contact = f"mailto:{contact.removeprefix('mailto:')}"
    expires = month_start(months_after(month_of(now), EXPIRES_AFTER_MONTHS)) // 1000
    lines = [
        f"Contact: {contact}",
        f"Expires: {datetime.fromtimestamp(expires, UTC):%Y-%m-%dT%H:%M:%SZ}",
    ]
    if settings.dashboard_url.startswith("https://"):
        lines.append(f"Canonical: {settings.dashboard_url.rstrip('/')}{SECURITY_TXT}")
    return "\n".join([*lines, ""])
