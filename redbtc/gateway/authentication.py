"""Find the API key of a request."""

from __future__ import annotations

from redbtc.errors import StorageUnavailable
from redbtc.headers import header
from redbtc.refusals import Refusal
from redbtc.server.asgi import Scope
from redbtc.store.database import Store
from redbtc.store.keys import Key, key_in_force

BAD_KEY = "Incorrect API key provided. Send your key as 'Authorization: Bearer sk-redbtc-…'."


def authenticate(scope: Scope, store: Store) -> Key:
    """The key in force that the request shows. Every flaw of a key has the same answer. Reads the
    database each time: revoking and suspending hold from the next request on."""
    scheme, _, token = (header(scope["headers"], b"authorization") or b"").partition(b" ")
    try:
        shown = token.strip().decode("ascii") if scheme.lower() == b"bearer" else ""
    except UnicodeDecodeError:
        shown = ""
    try:
        key = key_in_force(store, shown)
    except StorageUnavailable:
        raise Refusal("ledger_unavailable") from None
    if key is None:
        raise Refusal("invalid_api_key", BAD_KEY, headers=[(b"www-authenticate", b"Bearer")])
    if key.account_status != "active":
        raise Refusal("account_suspended")
    return key
