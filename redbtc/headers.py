"""HTTP headers, as pairs of bytes."""

from __future__ import annotations

import re

BAD_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 §5.5
Headers = list[tuple[bytes, bytes]]


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the value of the first header with a name, which is in lower case; None if there is
    none."""
    for key, value in headers:
        if key == name:
            return value
    return None
