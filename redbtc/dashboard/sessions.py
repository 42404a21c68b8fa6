"""Who visits: browsers that are logged in, and what they may do."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from redbtc.admin import http
from redbtc.admin.actors import Actor, Forbidden, Unauthorized
from redbtc.admin.api import API
from redbtc.admin.users import LoginSession, signature
from redbtc.server.asgi import request_of

# Who is logged in is told by a cookie; that a change comes from a page of ours, by Origin, which
# every browser sends with it. (None does under `no-referrer`: pages have a meta element for that.)
SECURITY = {
    **http.SECURITY,
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
SAFE = ("GET", "HEAD")


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
        raise Forbidden(f"the Origin header must be {own}: open the dashboard at its own address")
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise Forbidden("requests from other sites are refused")


def session_of(api: API, request: Request) -> LoginSession | None:
    """Of whoever is logged in. Raises StorageUnavailable."""
    cookie = cookie_of(request, "redbtc")
    return api.users.session(cookie) if cookie else None


def actor_for(session: LoginSession, request: Request) -> Actor:
    """What somebody who is logged in may do."""
    name, network = signature(session.email, session.account), network_of(request)
    return Actor(name, session.role, session.account_id, session=session, network=network)


def actor_of(api: API) -> Callable[[Request], Actor]:
    """Who calls the admin API on the public port: the key that the gateway has found to be
    valid, or a session."""

    def authenticate(request: Request) -> Actor:
        if key := request_of(request.scope).key:
            return Actor(f"key {key.id}", "key", key.account_id, key=key)
        session = session_of(api, request)
        if session is None:
            raise Unauthorized("not logged in; log in at /dashboard/login")
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
