"""The response headers that let browser pages of other origins use /v1: CORS (WHATWG Fetch, "CORS
protocol").

A page must hold an API key, and /v1 accepts no cookies, so allowing any origin gives no page more
than its key does. The headers are sent only in response to requests with an Origin header, so that
others cost no more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from redbtc.headers import Headers, header
from redbtc.server.asgi import App, Message, Receive, Scope, Send

PATHS = "/v1/"
# "*" covers whatever an upstream adds; the names are for browsers that don't support "*".
EXPOSED = (
    b"x-request-id, x-redbtc-request-id, retry-after, retry-after-ms, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, "
    b"x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens, "
    b"openai-processing-ms, openai-version, openai-model, cf-ray, date, age, *"
)
METHODS = b"GET, POST, DELETE"
PREFLIGHT_MAX_AGE = b"7200"  # Chromium's maximum


def cors_headers(origin: bytes, origins: Iterable[str]) -> Headers:
    """Return the headers that let a page of `origin` read a response; none if `origins` does not
    allow it. "*" in `origins` allows every origin, "null" included."""
    if "*" in origins:
        allowed = b"*"
    elif origin.decode("latin-1") in origins:
        allowed = origin
    else:
        return []
    return [
        (b"access-control-allow-origin", allowed),
        (b"access-control-expose-headers", EXPOSED),
        (b"vary", b"Origin"),
    ]


class CORS:
    """ASGI middleware that adds CORS headers to every response under /v1, refusals included."""

    def __init__(self, app: App, origins: Callable[[], Iterable[str]]) -> None:
        self._app = app
        self._origins = origins

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return the app's own coroutine: one more around it would slow down every request and
        event."""
        origin = header(scope["headers"], b"origin")
        if origin is not None and scope["type"] == "http" and scope["path"].startswith(PATHS):
            send = _adding(send, cors_headers(origin, self._origins()))
        return self._app(scope, receive, send)


def _adding(send: Send, more: Headers) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return send_with_headers


def preflight_headers(headers: Headers) -> Headers | None:
    """Return the headers that only the response to a preflight request has. Every header that the
    page asks to send is allowed (by name, since "*" does not cover Authorization): the ones that
    reach an upstream are chosen elsewhere. None if the request is not a preflight."""
    if header(headers, b"access-control-request-method") is None:
        return None
    added: Headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", PREFLIGHT_MAX_AGE),
        (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
    ]
    if asked := header(headers, b"access-control-request-headers"):
        added.append((b"access-control-allow-headers", asked))
    return added
