"""CORS: what browsers let pages of other origins do with /v1 (WHATWG Fetch, "CORS protocol").

A page needs no more than it has anyway, an API key: the gateway never asks a browser for
credentials of its own (cookies), so any origin may be allowed. The headers are sent only where the
request has an Origin, so that other requests cost no more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from redbtc_refusals import Headers, Refusal, header
from redbtc_watch import App, Message, Receive, Scope, Send

PATHS = "/v1/"
# Names for browsers that don't know "*"; it covers what an upstream adds.
EXPOSED = (
    b"x-request-id, x-redbtc-request-id, retry-after, retry-after-ms, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, "
    b"x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens, "
    b"openai-processing-ms, openai-version, openai-model, cf-ray, date, age, *"
)
METHODS = b"GET, POST, DELETE"
MAX_AGE_SECONDS = b"7200"  # Chromium believes no more


def cors_headers(origin: bytes, origins: Iterable[str]) -> Headers:
    """Return what an answer says to a page of that origin; nothing where it isn't allowed. "*" in
    `origins` allows every origin, also "null"."""
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
    """An ASGI app around another, whose answers it adds the headers to, refusals included."""

    def __init__(self, app: App, origins: Callable[[], Iterable[str]]) -> None:
        self._app = app
        self._origins = origins

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return the other's coroutine: another around it would cost each request and event."""
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


def preflight_headers(headers: Headers) -> Headers:
    """Return what the answer to a preflight request adds: every header that the page wants to send
    is allowed, since those which reach an upstream are chosen elsewhere ("*" would not cover
    authorization). Raise Refusal where this is no preflight."""
    if header(headers, b"access-control-request-method") is None:
        raise Refusal("unknown_url")
    added: Headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", MAX_AGE_SECONDS),
        (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
    ]
    if asked := header(headers, b"access-control-request-headers"):
        added.append((b"access-control-allow-headers", asked))
    return added
