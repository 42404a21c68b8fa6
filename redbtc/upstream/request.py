"""A request to an upstream, and its serialization for HTTP/1.1."""

from __future__ import annotations

import re
from typing import NamedTuple

import httpx2

from redbtc.headers import Headers

HEAD = re.compile(  # RFC 9112 §3, RFC 9110 §5.5
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [\x21-\x7e\x80-\xff]+ HTTP/1\.1\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+\r\n"
)


class UpstreamRequest(NamedTuple):
    """A request to the origin of `url`, with `target` after the method. `timeouts` are httpx2's
    ("connect", "read", "write"), in seconds; one that is missing or None does not apply."""

    method: str
    url: httpx2.URL
    target: bytes
    headers: Headers
    body: httpx2.AsyncByteStream
    timeouts: dict[str, float | None]


def serialize_head(request: UpstreamRequest) -> tuple[bytes, int | None]:
    """Return the head as it is sent, and the length of the body that it declares: None for a body
    in chunks. Raises LocalProtocolError for a head that could be read as another one."""
    length, chunked = 0, False
    lines = [b"%s %s HTTP/1.1\r\n" % (request.method.encode(), request.target)]
    for name, value in request.headers:
        lines.append(b"%s: %s\r\n" % (name, value))
        lower = name.lower()
        if lower == b"content-length":
            length = int(value)
        elif lower == b"transfer-encoding":
            chunked = True
    head = b"".join([*lines, b"\r\n"])
    if not HEAD.fullmatch(head) or head.count(b"\n") != len(lines) + 1:
        raise httpx2.LocalProtocolError("Illegal request head")
    return head, None if chunked else length
