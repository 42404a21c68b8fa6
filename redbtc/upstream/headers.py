"""The headers that are forwarded between client and upstream."""

from __future__ import annotations

import hmac
import re
import uuid

from redbtc.headers import (
    ALLOWED_HEADERS,
    ALLOWED_PREFIXES,
    DROPPED_REQUEST_HEADERS,
    Headers,
    header,
)

# Headers of the connection (RFC 9110 §7.6.1), of the upstream's account, for a proxy or a cache in
# front of the gateway, those that only the gateway itself sets, and those that a browser applies to
# the whole origin, which is also the dashboard's.
DROPPED_HEADERS = frozenset(
    b"connection keep-alive te trailer transfer-encoding upgrade "
    b"openai-organization openai-project server "
    b"x-reproxy-url expires surrogate-control cdn-cache-control cloudflare-cdn-cache-control "
    b"vercel-cdn-cache-control netlify-cdn-cache-control akamai-cache-control "
    b"x-envoy-immediate-health-check-fail x-envoy-degraded x-envoy-ratelimited "
    b"no-vary-search supports-loading-mode "
    b"set-cookie set-cookie2 set-login www-authenticate authentication-info clear-site-data "
    b"strict-transport-security public-key-pins public-key-pins-report-only expect-ct alt-svc "
    b"content-security-policy content-security-policy-report-only x-content-security-policy "
    b"x-webkit-csp x-frame-options permissions-policy permissions-policy-report-only "
    b"feature-policy document-policy document-policy-report-only integrity-policy "
    b"integrity-policy-report-only origin-agent-cluster origin-trial report-to "
    b"reporting-endpoints nel refresh link speculation-rules use-as-dictionary accept-ch "
    b"critical-ch service-worker-allowed sourcemap x-sourcemap sec-session-registration "
    b"secure-session-registration observe-browsing-topics activate-storage-access".split()
)
DROPPED_PREFIXES = (
    b"x-accel-",
    b"x-litespeed-",
    b"x-ratelimit-",
    b"x-redbtc-",
    b"access-control-",
    b"cross-origin-",
    b"proxy-",
    b"attribution-reporting-",
    b"x-sendfile",
    b"x-lighttpd-",
    b"edge-",
)
SPECIAL_HEADERS = frozenset([b"connection", b"cache-control"])
NO_STORE = (b"cache-control", b"no-store")
REQUEST_ID = b"x-request-id"
READABLE_ID = re.compile(rb"[!-~]{1,128}")
SHARED = re.compile(  # nginx caches by max-age whoever asks
    rb"(?i)public|s-maxage|must-revalidate|^(?!.*(?:private|no-store|no-cache)).*max-age"
)


def headers_for_upstream(headers: Headers, secret: bytes, idempotency_scope: str) -> Headers:
    """Return the client's headers that are forwarded, by an allow-list. An idempotency key is
    replaced by `own_idempotency_key`: otherwise an upstream would send two accounts that use the
    same key the same response. `idempotency_scope`: see ForwardedRequest."""
    scope = idempotency_scope
    return [
        (name, own_idempotency_key(secret, scope, value) if name == b"idempotency-key" else value)
        for name, value in headers
        if name in ALLOWED_HEADERS
        or (name.startswith(ALLOWED_PREFIXES) and name not in DROPPED_REQUEST_HEADERS)
    ]


def without(headers: Headers, names: frozenset[bytes]) -> Headers:
    """Return the headers but those with these names."""
    return [line for line in headers if line[0] not in names]


def own_idempotency_key(secret: bytes, scope: str, key: bytes) -> bytes:
    """Return the idempotency key to send upstream in place of a client's `key`: always the same
    one in the same scope, and a different one in any other. It has the form of a random UUID."""
    digest = hmac.digest(secret, b"%b\0%b" % (scope.encode(), key), "sha256")
    return str(uuid.UUID(bytes=digest[:16], version=4)).encode()


def request_id_in(received: Headers) -> str | None:
    """Return the upstream's id of a request from the headers of its answer, as `readable_id`
    does."""
    return readable_id(header([(name.lower(), value) for name, value in received], REQUEST_ID))


def readable_id(request_id: bytes | None) -> str | None:
    """Return an upstream's id of a request as text; None if there is none, or if it is not of up to
    128 printable ASCII characters without spaces."""
    return request_id.decode() if request_id and READABLE_ID.fullmatch(request_id) else None


def headers_for_client(received: Headers) -> Headers:
    """Return the upstream's headers that are forwarded: all but those of a deny-list and those that
    Connection names. "no-store" replaces a Cache-Control that lets a shared cache store the
    response."""
    headers = [
        (lower, value)
        for name, value in received
        if (lower := name.lower()) == b"connection"
        or (lower not in DROPPED_HEADERS and not lower.startswith(DROPPED_PREFIXES))
    ]
    special = [line for line in headers if line[0] in SPECIAL_HEADERS]
    if special:
        headers = [NO_STORE if may_be_shared(line) else line for line in headers]
        connection = [value for name, value in special if name == b"connection"]
        named = {token.strip().lower() for token in b",".join(connection).split(b",")}
        named.add(b"connection")
        headers = [line for line in headers if line[0] not in named]
    return headers


def may_be_shared(line: tuple[bytes, bytes]) -> bool:
    """Return whether a header lets a shared cache store the response to a request with an API key,
    and so give it to other accounts (RFC 9111 §3.5). Expires, which lets nginx, is dropped."""
    name, value = line
    return name == b"cache-control" and SHARED.search(value) is not None
