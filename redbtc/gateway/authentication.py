"""Find the API key of a request, and the client's own credential if it has sent one."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterable

from redbtc.errors import StorageUnavailable
from redbtc.headers import CREDENTIAL_HEADERS, Headers
from redbtc.refusals import Refusal
from redbtc.server.asgi import ClientRequest
from redbtc.store.credentials import ClientCredential
from redbtc.store.database import Store
from redbtc.store.keys import Key, is_key, key_in_force

BAD_KEY = (
    "Incorrect API key provided. Send your key as 'Authorization: Bearer sk-redbtc-…' or, if "
    "Authorization has a credential of your own, in the header that your administrator names."
)
GATEWAY_KEY = re.compile(rb"sk-redbtc-[A-Za-z0-9]{49}")
NOT_IN_A_CREDENTIAL = re.compile(rb"[^\x20-\x7e]")


def key_of_request(request: ClientRequest, store: Store, key_headers: frozenset[bytes]) -> Key:
    """Return the key in a request's headers, if it is in force: that of the one header named in
    `key_headers`, or if there is none, that in Authorization. Note both the key and the client's
    own credential in the request. Whatever is wrong with a key, the response is the same. The
    database is read each time, so that revoking a key and suspending an account take effect on the
    next request. Raises Refusal."""
    in_key_header: bytes | None = None
    authorization = b""
    for name, value in request.headers:
        if name in key_headers:  # of two, one reader may use the first and another the last
            in_key_header = value if in_key_header is None else b"two"
        elif name == b"authorization":  # the server has refused a second one
            authorization = value
    sent = authorization if in_key_header is None else in_key_header
    scheme, _, token = sent.partition(b" ")
    if in_key_header and not token:
        scheme, token = b"bearer", scheme
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
    request.key, request.credential = key, None
    if in_key_header and authorization:
        request.credential = credential_in(request.headers, key, store)
    return key


def credential_in(headers: Headers, key: Key, store: Store) -> ClientCredential | None:
    """Return the client's own credential, which a request with a key in another header has in
    Authorization. Return None for a key of this gateway, which must not be forwarded. Raises
    Refusal."""
    sent = [line for line in headers if line[0] in CREDENTIAL_HEADERS]
    names = [name for name, _ in sent]
    for name, value in sent:
        if names.count(name) > 1:
            raise Refusal("invalid_http", f"Duplicate header: {name.decode()}.")
        if NOT_IN_A_CREDENTIAL.search(value):  # a WebSocket's handshake would change it
            message = f"The header {name.decode()} has characters other than printable ASCII."
            raise Refusal("invalid_http", message)
    try:
        if any(is_key(store, shown) for shown in keys_in(value for _, value in sent)):
            return None
    except StorageUnavailable:
        raise Refusal("ledger_unavailable") from None
    return ClientCredential(sent, key.account_id, store.secret)


def keys_in(values: Iterable[bytes]) -> set[str]:
    """Return what looks like a key of this gateway in the values of headers, also within the user
    and password of the scheme Basic (RFC 7617)."""
    found: set[str] = set()
    for value in values:
        scheme, _, rest = value.partition(b" ")
        texts = [value]
        if scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):  # some clients leave the padding out
                texts.append(base64.b64decode(rest + b"=="))
        found.update(key.decode() for text in texts for key in GATEWAY_KEY.findall(text))
    return found
