"""Who visits: browsers that are logged in, what they may do, and what everybody is told. The pages
themselves are in redbtc_dashboard.py, which is loaded when the first of them is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import redbtc_admin as admin
from redbtc_admin import API, Actor, Forbidden, Unauthorized
from redbtc_billing import Books
from redbtc_ledger import Record
from redbtc_settings import iso_time
from redbtc_users import Session, signature

if TYPE_CHECKING:
    from redbtc_dashboard import Dashboard

# ── Browsers ─────────────────────────────────────────────────────────────────────────────────────
# Who is logged in is told by a cookie; that a change comes from a page of ours, by Origin, which
# every browser sends with it. (None does under `no-referrer`: pages have a meta element for that.)

SECURITY = {
    **admin.SECURITY,
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
SAFE = ("GET", "HEAD")
BROWSER_SECONDS = 365 * 86400


def cookie_name(request: Request, name: str) -> str:
    """With TLS the browser itself keeps other hosts and paths from setting it."""
    return f"__Host-{name}" if request.url.scheme == "https" else name


def cookie_of(request: Request, name: str) -> str:
    """Return the value of a cookie that `set_cookie` set, "" if there is none. (To resolve quotes,
    as Starlette does, takes seconds for a long value before Python 3.12.6.)"""
    wanted, found = cookie_name(request, name), ""
    for line in request.headers.getlist("cookie"):
        for pair in line.split(";"):
            if wanted in pair:  # or 60 KB of semicolons would take 3 ms each time
                key, _, value = pair.partition("=")
                found = value.strip() if key.strip() == wanted else found
    return found


def set_cookie(
    request: Request, response: Response, name: str, value: str, age: int | None
) -> None:
    """`age` in seconds; None: while the browser runs."""
    response.set_cookie(
        cookie_name(request, name),
        value,
        max_age=age,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def check_origin(request: Request) -> None:
    """Raises Forbidden for a change that doesn't come from here, or doesn't say so."""
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if request.headers.get("origin") != own:
        raise Forbidden(f"a change must come from here: with the header Origin: {own}")
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise Forbidden("this came from another site")


def session_of(api: API, request: Request) -> Session | None:
    """Of whoever is logged in. Raises LedgerUnavailable."""
    cookie = cookie_of(request, "redbtc")
    return api.users.session(cookie) if cookie else None


def actor_for(session: Session, request: Request) -> Actor:
    """What somebody who is logged in may do."""
    name, network = signature(session.email, session.account), network_of(request)
    return Actor(name, session.role, session.account_id, session=session, network=network)


def actor_of(api: API) -> Callable[[Request], Actor]:
    """Who calls the admin API on the public port: a key that the gateway has put into the scope, or
    a session."""

    def authenticate(request: Request) -> Actor:
        if key := request.scope.get("key"):
            return Actor(f"key {key.id}", "key", key.account_id, key=key)
        session = session_of(api, request)
        if session is None:
            raise Unauthorized("nobody is logged in; the dashboard's login is /dashboard/login")
        if request.method not in SAFE:
            check_origin(request)
        return actor_for(session, request)

    return authenticate


def network_of(request: Request) -> str:
    """The client's address; of IPv6 the /64 that one has."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((address, 64), strict=False))


# ── Status ───────────────────────────────────────────────────────────────────────────────────────
# What everybody may know of the gateway, without a key.


async def status(books: Books, uptime_seconds: int) -> Record:
    """Return what /status says. A ledger that can't commit is an incident: nothing is served."""
    shown = ("id", "kind", "text", "effective_at", "until", "created_at")
    notices = [{name: row[name] for name in shown} for row in await books.notices_now()]
    now = str(iso_time(books.store.time()))
    in_force = {notice["kind"] for notice in notices if notice["effective_at"] <= now}
    if not books.store.healthy:
        in_force.add("incident")
    worst = [kind for kind in ("incident", "maintenance") if kind in in_force]
    return {
        "status": worst[0] if worst else "ok",
        "uptime_seconds": uptime_seconds,
        "incidents": [notice for notice in notices if notice["kind"] == "incident"],
        "notices": [notice for notice in notices if notice["kind"] != "incident"],
    }


MAX_ACCEPT = 2000  # characters of an Accept header that are looked at; a browser's has 150


def prefers_html(accept: str) -> bool:
    """Whether an Accept header asks for a page rather than for JSON (RFC 9110 §12.5.1)."""
    weights: dict[str, float] = {}
    for entry in accept.lower()[:MAX_ACCEPT].split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        quality = [part[2:] for part in parameters if part.startswith("q=")]
        with contextlib.suppress(ValueError):
            weights[name] = float(quality[0]) if quality else 1.0
    return weights.get("text/html", 0) > weights.get("application/json", 0)


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────


class Pages:
    """The dashboard as an ASGI app. To load it takes 50 ms, and many gateways never show a page, so
    that is done at the first request for one, in a thread."""

    def __init__(self, api: API) -> None:
        self._api = api
        self._loading: asyncio.Task[tuple[Dashboard, Starlette]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, app = await self._loaded()
        await app(scope, receive, send)

    async def page(self, template: str, context: Any) -> Response:
        """Draw one page for somebody who need not be logged in."""
        dashboard, _ = await self._loaded()
        return await dashboard.page(template, context)

    async def _loaded(self) -> tuple[Dashboard, Starlette]:
        if self._loading is None:
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        try:
            return await asyncio.shield(self._loading)
        except Exception:  # no descriptors, no memory: the next request tries again
            self._loading = None
            raise

    def _load(self) -> tuple[Dashboard, Starlette]:
        from redbtc_dashboard import Dashboard

        dashboard = Dashboard(self._api)
        return dashboard, dashboard.app()
