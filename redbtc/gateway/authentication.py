"""Find the API key of a request."""

from __future__ import annotations

from redbtc.errors import StorageUnavailable
from redbtc.headers import Headers, header
from redbtc.refusals import Refusal
from redbtc.store.database import Store
from redbtc.store.keys import Key, key_in_force

BAD_KEY = "Incorrect API key provided. Send your key as 'Authorization: Bearer sk-redbtc-…'."


def key_in_headers(headers: Headers, store: Store) -> Key:
    """Return the key in a request's headers, which is in force. Every flaw of a key has the same
    response. The database is read each time, so that revoking a key and suspending an account take
    effect on the next request. Raises Refusal."""
    scheme, _, token = (header(headers, b"authorization") or b"").partition(b" ")
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
