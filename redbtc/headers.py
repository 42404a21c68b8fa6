"""HTTP headers, as pairs of bytes."""

from __future__ import annotations

import re

BAD_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 §5.5
Headers = list[tuple[bytes, bytes]]

# The client's headers that are forwarded to upstreams.
ALLOWED_HEADERS = frozenset(
    b"accept content-type content-encoding user-agent idempotency-key openai-beta originator "
    b"version session-id session_id thread-id x-client-request-id "
    # The x-openai-* headers that Codex sends with an API key. Others authorize, or choose an
    # organization, a region or a product.
    b"x-openai-internal-codex-responses-lite x-openai-memgen-request x-openai-subagent".split()
)
ALLOWED_PREFIXES = (b"x-codex-", b"x-stainless-")
# This header names a model and a tier, of which only those in the body are checked. Codex sends it
# only with a ChatGPT login.
DROPPED_REQUEST_HEADERS = frozenset([b"x-codex-routing-hint"])
# A client's own credential, which is forwarded to upstreams with `credentials = "client"` alone.
CREDENTIAL_HEADERS = frozenset([b"authorization", b"chatgpt-account-id"])


def may_come_from_client(name: bytes) -> bool:
    """Return whether a client's header of this name, in lower case, can reach every upstream."""
    allowed = name in ALLOWED_HEADERS or name.startswith(ALLOWED_PREFIXES)
    return allowed and name not in DROPPED_REQUEST_HEADERS


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the value of the first header with a name, which is in lower case; None if there is
    none."""
    for key, value in headers:
        if key == name:
            return value
    return None
