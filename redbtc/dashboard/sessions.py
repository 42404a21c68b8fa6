"""Sessions of browsers that are logged in: cookie, origin, network, and what the user may do."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from redbtc.admin import http
from redbtc.admin.actors import Actor, Forbidden, Unauthorized
from redbtc.admin.api import API
from redbtc.admin.users import LoginSession, name_in_log
from redbtc.server.asgi import request_of

# A cookie identifies the session. The Origin header, which every browser sends with a POST, proves
# that a change comes from one of the gateway's own pages. (Under the policy `no-referrer` browsers
# leave Origin out, so pages override it with a meta element.)
PAGE_HEADERS = {
    **http.SECURITY_HEADERS,
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
SAFE = ("GET", "HEAD")


def cookie_name(request: Request) -> str:
    """Return the name of a session's cookie. With TLS its prefix makes the browser refuse it from
    other hosts and for other paths."""
    return "__Host-redbtc" if request.url.scheme == "https" else "redbtc"


def session_cookie(request: Request) -> str:
    """Return the session's cookie, "" if there is none. (Starlette resolves quotes, which takes
    seconds for a long value before Python 3.12.6.)"""
    wanted, found = cookie_name(request), ""
    for line in request.headers.getlist("cookie"):
        for pair in line.split(";"):
            if wanted in pair:  # or 60 KB of semicolons would take 3 ms each time
                key, _, value = pair.partition("=")
                found = value.strip() if key.strip() == wanted else found
    return found


def set_session_cookie(request: Request, response: Response, value: str) -> None:
    """Give the browser a session's cookie until it is closed, or with "" take the cookie away."""
    response.set_cookie(
        cookie_name(request),
        value,
        max_age=None if value else 0,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def check_origin(request: Request) -> None:
    """Raise Forbidden for a change that does not come from the gateway's own pages."""
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if request.headers.get("origin") != own:
        raise Forbidden(f"the Origin header must be {own}: open the dashboard at its own address")
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise Forbidden("requests from other sites are refused")


def session_of(api: API, request: Request) -> LoginSession | None:
    """Return the session that the request's cookie identifies. Raises StorageUnavailable."""
    cookie = session_cookie(request)
    return api.users.session(cookie) if cookie else None


def actor_for(session: LoginSession, request: Request) -> Actor:
    """Return the actor for the admin API that a logged-in user is."""
    name, network = name_in_log(session.email, session.account), network_of(request)
    return Actor(name, session.role, session.account_id, session=session, network=network)


def authenticator(api: API) -> Callable[[Request], Actor]:
    """Return a function that authenticates requests to the admin API on the public port: by the key
    that the gateway has found to be valid, or by the session."""

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
    """Return the client's address, or for IPv6 the /64 that a client usually has to itself."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((address, 64), strict=False))
