"""A client's own credential, which is forwarded to upstreams with `credentials = "client"` alone.

It is never written anywhere. What is stored at such an upstream belongs to the account and to the
credential, for which a keyed hash stands in the database.
"""

from __future__ import annotations

import base64
import hmac
import re

import msgspec

from redbtc.headers import Headers

DIGEST_SIZE = 32  # hexadecimal digits
BEARER_JWT = re.compile(rb"(?i:bearer) +[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]*")


class Claims(msgspec.Struct):
    """The claims of a JSON Web Token that say whose it is (RFC 7519 §4.1)."""

    sub: str
    iss: str = ""


CLAIMS = msgspec.json.Decoder(Claims)


class ClientCredential:
    """A client's own credential. `headers` is what is forwarded. `digest` stands for it where an
    object is recorded that it has made. (This is no tuple or Struct: its repr shows nothing.)"""

    __slots__ = ("digest", "headers")

    def __init__(self, headers: Headers, account_id: str, secret: bytes) -> None:
        """`headers` are those of CREDENTIAL_HEADERS that the client has sent, each once."""
        self.headers = headers
        # The lengths keep two different credentials from having the same text.
        parts = [account_id.encode(), *identity_in(dict(headers))]
        text = b"credential" + b"".join(b"\0%d:%b" % (len(each), each) for each in parts)
        self.digest = hmac.digest(secret, text, "sha256").hex()[:DIGEST_SIZE]


def identity_in(headers: dict[bytes, bytes]) -> tuple[bytes, ...]:
    """Return what stays the same of a credential while it is in use.

    An API key stays as it is. The token of a ChatGPT login, which comes with a ChatGPT-Account-ID,
    is replaced about every hour; its user does not change. The account id alone is not enough: all
    members of a workspace send the same.

    The token's signature is not checked here. A client could forge a token with the name of another
    user, but only within its own account (the caller mixes that in), and it gains nothing: whatever
    is found by this identity is asked of the upstream with the same token, and the upstream checks
    it. Nothing stored is told, changed or forgotten here before the upstream has agreed."""
    authorization = headers.get(b"authorization", b"")
    workspace = headers.get(b"chatgpt-account-id")
    if workspace is None:
        return (b"value", authorization)
    if found := BEARER_JWT.fullmatch(authorization):
        try:
            claims = CLAIMS.decode(base64.urlsafe_b64decode(found[1] + b"=="))
            return (b"user", workspace, claims.iss.encode(), claims.sub.encode())
        except (ValueError, msgspec.DecodeError):
            pass  # it is no JSON Web Token of a user
    return (b"value of", workspace, authorization)
